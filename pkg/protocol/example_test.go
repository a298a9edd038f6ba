package protocol

import (
	"context"
	"fmt"
	"io"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// A device of 1 MiB moves over two pipes.
func Example() {
	const size = 1 << 20
	ctx := context.Background()
	destDev := make(chan uint32, 1)
	r1, w1 := io.Pipe()
	r2, w2 := io.Pipe()

	prSource := NewProtocolRW(ctx, r1, w2, nil)
	prDest := NewProtocolRW(ctx, r2, w1, func(p Protocol, dev uint32) { destDev <- dev })
	go func() { _ = prSource.Handle() }()
	go func() { _ = prDest.Handle() }()

	sourceToProtocol := NewToProtocol(uint64(size), 1, prSource)
	var store storage.StorageProvider
	storeFactory := func(di *DevInfo) storage.StorageProvider {
		store = sources.NewMemoryStorage(int(di.Size))
		return store
	}
	destFromProtocol := NewFromProtocol(1, storeFactory, prDest)

	needed := make(chan int64, 1)
	sourceToProtocol.HandleNeedAt(func(off, length int64) { needed <- off })
	if err := sourceToProtocol.SendDevInfo("disk", 64<<10, ""); err != nil {
		fmt.Println(err)
	}
	fmt.Println("device", <-destDev)
	if err := destFromProtocol.NeedAt(512<<10, 64<<10); err != nil {
		fmt.Println(err)
	}
	off := <-needed
	n, err := sourceToProtocol.WriteAt([]byte("hello"), off)
	fmt.Println(n, err)

	b := make([]byte, 5)
	_, err = store.ReadAt(b, off)
	fmt.Printf("%s %v\n", b, err)
	_ = prSource.Close()
	_ = prDest.Close()
	// Output:
	// device 1
	// 5 <nil>
	// hello <nil>
}
