"""Arrays on disk: a Zarr v3 group with completion records, written shard by shard and read at the speed of the disk."""
