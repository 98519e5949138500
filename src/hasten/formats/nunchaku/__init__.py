"""SVDQuant files of nunchaku and of nunchaku_lite."""
