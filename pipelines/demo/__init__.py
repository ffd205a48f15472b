"""The world of moving shapes and the tiny CLIP that sees it: what `vcache demo` and many tests run on, offline."""
