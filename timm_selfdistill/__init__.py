"""Turn any timm backbone into its own teacher."""
