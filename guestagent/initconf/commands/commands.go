// Package commands is what starts commands in a guest besides the init: how names
// become programs there. It is a file of its own, in a form that needs no decoder
// which a program has not got already.
package commands

import "encoding/json"

// Path is the file's place in the initramfs.
const Path = "/etc/gondola/commands.json"

// Config says how a command that is no path is found. The zero value is execvp(3)'s
// way.
type Config struct {
	// Applets is a multi-call binary which performs commands that are not found in
	// PATH under their own name, "/bin/busybox" for example.
	Applets string `json:"applets,omitempty"`
	// FullArgv0 gives a command that was found in PATH its full path as argument 0,
	// for multi-call binaries that follow links from there.
	FullArgv0 bool `json:"fullArgv0,omitempty"`
}

// Marshal returns the file's content.
func (c Config) Marshal() ([]byte, error) { return json.Marshal(c) }

// Unmarshal reads the file's content. Unknown fields are ignored.
func Unmarshal(b []byte) (c Config, err error) {
	err = json.Unmarshal(b, &c)
	return c, err
}
