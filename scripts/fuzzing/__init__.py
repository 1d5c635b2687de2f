"""`scripts/fuzz`: damaged and hostile inputs, made from sound ones, and what adapterops does with them."""
