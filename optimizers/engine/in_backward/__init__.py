"""Updates in the backward pass: `update` turns them on, `passes` makes them, `handle` has them."""
