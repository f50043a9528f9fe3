"""One file per verb: parse, call one function, print a path or a table."""
