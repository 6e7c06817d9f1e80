"""The bundled tiny reasoner, its problems, and the scripts that made both."""
