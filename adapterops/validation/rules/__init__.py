"""The rules that hold for every format, one file a group; a format's own come from its plugin (`Format.rules`)."""
