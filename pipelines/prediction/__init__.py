"""A trained head on new videos: what `vcache predict` and `vcache export` are made of."""
