"""Video heads: small trainable networks that read cached features; torch only, one file per head."""
