"""AdapterHub's folders: one adapter in each."""
