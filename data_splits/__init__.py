"""Which images are labelled: fetch a published list or draw one."""
