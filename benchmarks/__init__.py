"""What glocal costs, beside peers and beside the bare network, measured in one run."""
