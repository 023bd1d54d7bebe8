"""Dispatch: every token's row to the ranks that hold its experts, once per rank."""
