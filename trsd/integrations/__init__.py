"""One import into other people's trainers: rows, losses and modules that run our objective inside them."""
