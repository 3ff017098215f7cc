"""How well a front routes: a public trace against engines that model their KV cache, in scaled time."""
