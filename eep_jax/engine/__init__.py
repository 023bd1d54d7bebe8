"""The engine of one rank: requests in, tokens out, one compiled step at a time."""
