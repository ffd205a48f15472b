"""Videos in, named arrays out: datasets, frame sampling, decoding, preprocessing and the frozen open_clip backbone."""
