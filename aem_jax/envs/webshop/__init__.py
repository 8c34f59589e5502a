"""WebShop in pure Python: the shop, its search engine and its reward, step for step those of the original."""
