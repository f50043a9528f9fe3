"""The library verbs, on objects: collect, plan, compress, evaluate, diagnose, … The command line calls them and prints."""
