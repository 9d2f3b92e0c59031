"""Short programs, one story each; they run on data that ships in a package."""
