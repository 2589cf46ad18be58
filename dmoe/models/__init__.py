"""The reference transformer. It knows the layer and the config, never a rank."""
