"""How good reconstructions are: metrics, the published test protocol, tables and figures. Imported by sub-module."""
