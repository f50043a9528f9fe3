"""One benchmark, one file; each registers itself when the registry is first looked into."""
