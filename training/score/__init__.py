"""How good the bundled models are: distribution (KID), caption (alignment score) and style of their samples."""
