"""Where encoded images come from: .beton files, folders, tar shards; and what their bytes are."""
