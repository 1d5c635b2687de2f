"""The file formats that come with adapterops, each a plugin like any third party's."""
