package main

// gondola is built twice: whole, and with the tag lean, without the commands below.
// What they are linked with would be in the memory of every machine, as gondola run
// is the machine's process. A lean gondola hands them to gondola-full beside it.
const fullName = "gondola-full"

// fullOnly are these commands with their short descriptions.
var fullOnly = [][2]string{
	{"manager", "Divide the host's memory among the running machines"},
}
