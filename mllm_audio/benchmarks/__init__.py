"""How long generating, training and decoding take on this machine, part by part."""
