"""What a GPU does faster than by torch's own operators; each is tried on the device before it is relied on."""
