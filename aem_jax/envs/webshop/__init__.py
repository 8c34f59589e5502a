"""WebShop in pure Python: the shop, its search engine and its reward. Every step matches the original."""
