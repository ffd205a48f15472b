"""The machine and what lies on its disks: `vcache doctor`, `ls`, `rm` and `gc`."""
