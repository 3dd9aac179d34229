"""Networks that show their taps: encode, decode, segment."""
