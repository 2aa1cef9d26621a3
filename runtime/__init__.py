"""Bundle -> tokens. Needs numpy and one backend; never imports torch, transformers or kivy."""
