"""From text to token ids and positions, and back."""
