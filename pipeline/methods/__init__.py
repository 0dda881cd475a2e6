"""Methods that keep or adapt knowledge, one a file: what each may do in a run is in `method`."""
