package guest_test

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/vmm/guest"
)

// A command in a fresh Linux guest. (No output is compared: compiled, not run,
// because a boot takes a while.)
func Example() {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	g, err := guest.Start(ctx, guest.Config{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer g.Close()
	if err := g.Ready(ctx); err != nil {
		fmt.Println(err)
		return
	}
	status, err := g.Agent().Exec(ctx, guestagent.Command{Args: []string{"uname", "-a"}, Stdout: os.Stdout})
	fmt.Println(status.Code, err)
}
