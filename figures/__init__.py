"""The pictures in docs/figures: what each method pulls together and pushes apart, drawn from what its code does."""
