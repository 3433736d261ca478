"""One page that shows what a run did: `document` is what it says, `html` and `markdown` how."""
