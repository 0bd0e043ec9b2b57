"""Images into .beton files."""

from fastpmae_loaders.cli.process import begin

begin()
