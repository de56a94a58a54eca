"""Raw text to `.bin/.idx`: `preprocessing` is the door, `pipeline` encodes on all cores, `journal` survives a kill."""
