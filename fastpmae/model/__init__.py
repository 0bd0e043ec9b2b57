"""The networks: ViT encoder, decoder, head, teachers."""
