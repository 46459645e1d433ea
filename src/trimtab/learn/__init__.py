"""Learning directions from activations."""
