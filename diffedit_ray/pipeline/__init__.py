"""Ray Data: fetch, edit, store, and the job around them."""
