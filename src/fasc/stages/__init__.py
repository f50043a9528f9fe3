"""The library verbs, on objects: collect, plan, compress, evaluate, diagnose, … The command line parses, calls one, and prints."""
