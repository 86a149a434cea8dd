"""WHO SPEAKS: engines that turn prompts into completions, behind one seam (`base.Engine`)."""
