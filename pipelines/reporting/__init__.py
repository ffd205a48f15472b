"""What came of runs, for people to read: `vcache report` and `vcache compare`."""
