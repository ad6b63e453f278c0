"""In place of a package that jsonschema imports where it finds it, and that parses a grammar of web
addresses in every process that opens a notebook or joins Ray: 1.5 s. No test checks an address."""

raise ImportError('left out for the sake of time, see above')
