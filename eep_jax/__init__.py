"""A runtime for wide expert-parallel MoE inference that survives partial rank failure.

Importing this package costs nothing: parts are imported from their modules, see WORKSPACE.md.
"""

__version__ = "0.1.0"
