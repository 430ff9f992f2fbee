"""Turn plans into advice: hours and money, what is known of each method's quality, which one to take for which goal."""
