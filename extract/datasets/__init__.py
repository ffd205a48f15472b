"""Where the videos and their labels come from: one file per dataset, found by the registry."""
