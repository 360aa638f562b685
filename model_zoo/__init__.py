"""Networks that fxprune is held to, and the commands that measure it on them. Not part of the installed package."""
